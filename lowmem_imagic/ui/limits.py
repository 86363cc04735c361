"""Limits of the studio: sizes of uploads, and the times after which they are deleted."""

MAX_PHOTO_BYTES = 64 * 2**20
"""Largest file that a visitor may upload."""
MAX_UPLOADS_BYTES = 512 * 2**20
"""Most bytes of uploads that one visitor has at a time."""
MAX_VISITORS_BYTES = 4 * 2**30
"""Most bytes of uploads of all visitors."""
MAX_BATCH_ITEMS = 200
"""Most photos times sentences of one batch from the page."""
MAX_BODY_BYTES = 1 << 20
"""Largest request that is no upload."""
MAX_UPLOAD_PIXELS = 50_000_000
"""Largest photo; checked from its header, before decoding."""
VIEW_PX = 1024
"""Longest side of the pictures on the page; downloads have the photo's own size."""
LEAVE_S = 15 * 60
"""A visitor without an open tab for so long has left, and the uploads are deleted."""
KEEP_S = 24 * 3600
"""Results of a job that ended while its visitor was away are kept for so long."""
MAX_SEEDS = 8
"""Most rows of pictures of one sentence."""
MAX_PROJECTS = 20
"""Most photos of one visitor at a time; the oldest goes first."""
MAX_WAITING = 20
"""Most jobs of one visitor that wait for the card."""
