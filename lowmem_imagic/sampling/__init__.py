"""Stage 3: pictures between the photo and the sentence."""
