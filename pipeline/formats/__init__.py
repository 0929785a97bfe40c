"""One file for each kind of unit: how its rows are found. read.py gives them their place."""
