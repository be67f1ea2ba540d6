"""Online part: encode and decode K and V with the constants of a calibration, in the packed layout."""
