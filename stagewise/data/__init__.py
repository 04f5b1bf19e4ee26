"""From files to batches: records, sources, tokenization, packing, collators, and the audit of what will be trained on.

Nothing here knows a model. ``records`` says what a row means, ``files`` reads rows, ``sources`` makes data sets.
"""
