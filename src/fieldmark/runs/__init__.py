"""Settings become a run: the only room that turns settings into parts and writes run folders."""
