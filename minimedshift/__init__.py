"""MedShift from scratch. The README has the tree of the files and the order in which to read them."""
