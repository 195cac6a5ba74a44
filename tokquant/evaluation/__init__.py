"""Measuring schemes: the accuracy and the speed of attention with them."""
