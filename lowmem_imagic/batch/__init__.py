"""Many photos at once: a manifest of items (`manifest`), trained in refilling packs, one folder per item (`runner`)."""
