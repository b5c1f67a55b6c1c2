"""slidesparse."""
