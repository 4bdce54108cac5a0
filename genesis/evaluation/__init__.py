"""What is measured of weights, and how it is compared."""
