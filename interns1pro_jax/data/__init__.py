"""From raw scientific files to batches.

`records`           the document: text, images and signals in reading order, and its place on disk
`sources`           random access to the documents of record files
`quarantine`        what happens to a document that cannot be used
`image_processing`  native-resolution resizing and patches
`encoding`          a document as tokens, patches and samples
`packing`           documents into rows of fixed size
`pipeline`          rows into batches; batch k is a function of seed and k
`validation`        fixed batches, with media in place, removed or swapped; prompts
`unigram`           the loss of the best context-free model, the baseline of a report
`prepared`          the directory that `samples.prepare` writes and training reads
`samples`           real, licensed sample data: packages that carry them, readers, captions
"""
