"""Training checkpoints: written whole or not at all, verified before anything is unpickled.

    directory.py        names, `latest`, and which checkpoints are kept
    manifest.py         size and digest of every file
    verify.py           a checkpoint against its manifest
    safe_unpickle.py    the pickles in it, read without executing them
    shard_writer.py     a rank's tensors, written, fsynced and hashed in threads
    optimizer_state.py  the optimizer's tensors, named after their weights
    state.py            the state of a run as one sharded state dict, and back
    assets.py           the tokenizer and the other files beside the state
    tokenizer.py        the tokenizer of a checkpoint, and whether another one equals it
    versions.py         the software that wrote it
    collective.py       errors of any rank, raised on all
    checkpointer.py     saving, at once or in the background
    resume_policy.py    which settings may change
    resume.py           which checkpoint a run starts from

docs/reliability.md says what is guaranteed, and how it is tested.
"""
