"""Files of one modality become shards; ``uml_fast/prepare.py`` is the command line.

In the order of the data: ``folders``, ``tables`` and ``arrays`` (with ``restricted`` for pickles)
find the inputs, ``listing`` gives them class, split, key and order, ``images``, ``audio``, ``text``
and ``features`` convert them, in the processes of ``pool``, ``writer`` writes the shards,
``manifest`` describes them, and ``build`` does all of that. ``items`` has what passes between them.
"""
