"""Experience replay: the buffer of past samples, where their data lies, and how any source of samples is read."""
