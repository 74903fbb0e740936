"""The error of a corpus that cannot be used. Its message names the file, row or setting, and what to do."""


class CorpusError(ValueError):
    """Input data or settings that the corpus stage refuses."""
