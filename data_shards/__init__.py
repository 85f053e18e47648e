"""Building, indexing, planning and streaming webdataset shards.

Of this project's packages it imports only ``mmcot.texts.sample``: features, prompts and
tokenizers are passed in as plain functions.
"""
