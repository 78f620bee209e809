"""Experience replay: the buffer of past samples, the storage of its data, and the reading of any source of samples.

- :mod:`~gradmix.replay.buffer`: the public :class:`gradmix.ReplayBuffer`, composed of the parts below.
- :mod:`~gradmix.replay.ledger`: which samples are held: keys, labels, counts by class, quotas.
- :mod:`~gradmix.replay.draws`: which of the held samples are drawn.
- :mod:`~gradmix.replay.layout`: parts, shapes and dtypes of a sample, and the check of samples that are added.
- :mod:`~gradmix.replay.store`: the protocol of a place for the data, implemented by
  :mod:`~gradmix.replay.memory_store` and :mod:`~gradmix.replay.file_store`.
- :mod:`~gradmix.replay.sample_files` and :mod:`~gradmix.replay.column_file`: the folder of a file store, and one of its
  files.
- :mod:`~gradmix.replay.prefetch`: the copy of the next draw in the background.
- :mod:`~gradmix.replay.state`: the formats of a saved buffer.
- :mod:`~gradmix.replay.sources`: ``(x, y)`` of a buffer, a pair, a data set or a data loader, in chunks.
"""
