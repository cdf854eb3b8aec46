"""The recipe of nano, the model that ships with the package: see README.md."""
