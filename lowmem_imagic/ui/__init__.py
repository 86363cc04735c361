"""The studio: one page in the browser, served from this machine."""
