"""Real sample data of every kind the model reads, out of packages that carry it.

`packages`   which packages, pinned to the byte, with licence and origin of what is used
`prose`      documentation with formulas
`molecules`  molecules with names, measured values and drawings
`pictures`   photographs, micrographs, handwritten digits
`signals`    seismograms, electrocardiograms, pulse waves, labelled series
`prepare`    documents, split, tokenizer and record files
"""
