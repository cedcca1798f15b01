"""Long speech as token datasets: codecs, text alignment, a TFDS builder and a random-access reader."""
