"""Services that all packages use: checks of arguments and values, processes, devices, locks, names as text."""
