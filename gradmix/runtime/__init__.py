"""Services below all rooms: checks of arguments and values, processes, devices, locks, names as text."""
