"""Training and evaluation of the small pipeline that ships with the package."""
