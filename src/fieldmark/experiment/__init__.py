"""Settings become runs, and runs become evidence."""
