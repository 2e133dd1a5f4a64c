"""Old configs become recipes; they are read as text and never run."""
