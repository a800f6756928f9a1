"""Methods for streams of frames: what did not change is reused, what is not new is left out."""
