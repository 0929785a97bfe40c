"""What a run will do, from names and headers alone (`vl01 plan`). Starts and writes nothing."""
