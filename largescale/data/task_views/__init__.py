"""Views that are a task: what was done to each is what a network is to find out. Pure functions, on the device."""
