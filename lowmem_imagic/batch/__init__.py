"""Many photos at once: a manifest of items (`manifest`), run in refilling packs into a folder each (`runner`)."""
