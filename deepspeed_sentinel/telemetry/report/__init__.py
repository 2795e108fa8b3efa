"""The report of a run, from the files that it left: ``reading`` -> ``digest``, ``heat`` -> ``page``, ``table``.

Nothing here needs torch or a running engine. What is in the files may be torn, of another version, or written by
somebody who means harm: ``reading`` lets through what fits, and says what it left out.
"""
