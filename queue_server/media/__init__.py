"""Stored files: the images and videos that jobs need, and the files that jobs bring.

A file is named by the SHA-256 of its bytes. What is known of it lies in Redis ({vq}:media:<id>, whose lifetime is the file's).
The bytes lie there too ({vq}:blob:<id>), or, when there is an object store and the file is large, in one object of it.
"""
