"""From users' files to batches: exact, resumable anywhere, the same for any number of processes.

Preparation, once (`tools.prepare_data`):

`formats`           a user's record (conversation, document, interleaved, structured) as a document, or the reason why not
`transforms`        structured records put into words by templates
`media`             files of images, videos and signals, read within bounds
`records`           the document: text, images, videos and signals in reading order
`image_processing`, `video_processing`, `placeholders`   native-resolution resizing, frames, patches, their placeholders
`encoding`          a document as token ids, labels and media
`examples`          encoded documents and their records: one conversation, a chunk of many texts, or a packed row
`packing`           which documents share a row, from their sizes alone
`preparation`       slices of the input into shards and tables, in parallel and resumable
`sources`           the prepared source: manifest, tables of sizes, shards with random access
`paths`             local, gs:// and s3:// by one way

Order, a pure function of (seed, step):

`permutation`       random permutations of huge ranges, computed instead of stored
`mixture`           which source, epoch and record draw n is; weights exact at any moment, curriculum, limits
`balance`           equal attention cost for all ranks
`plan`              which rows batch k has. Every process plans the whole global batch from the tables of sizes, reading no record.
                    Rows that were packed beforehand are draws of the mixture, so any step is found at once. Documents that are packed
                    on the way go block by block; there the place of a step is two integers, which the checkpoint holds.

Reading:

`pipeline`          planned rows into arrays: a process reads the rows of its devices, Grain ahead of time
`quarantine`        records that cannot be used, counted by reason; too many stop the run
`corpus`            all this as a recipe names it

Evaluation and samples:

`validation`        held-out documents in memory; with media in place, removed or swapped; prompts
`unigram`           the loss of the best context-free model, the baseline of a report
`samples`           real, licensed sample data: packages that carry them, readers, captions
"""
