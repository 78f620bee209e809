"""What exceeds a limit of ``test_ratchet.py``, which writes this file: entries may only shrink."""

EXCEPTIONS: dict[str, dict[str, int]] = {
    "lines of a file": {},
    "lines of a function": {},
    "parameters": {},
    "modules in an import cycle": {},
}
