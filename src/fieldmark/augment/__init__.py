"""One batch's random numbers, and the executors that apply them."""
