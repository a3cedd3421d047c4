"""What ``espalier`` does for each of its commands; :mod:`services.cli` puts them together."""
