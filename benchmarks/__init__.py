"""Speed and memory, each by one command, the peers beside us in the same interleaved rounds."""
