"""The web page of `layalign serve MODEL --ui`: a question in any language, and two answers beside each other as they are written.

`launch` starts LayAlign's server and, of its LLM alone, another; `asking` is their client, `view` the page, `child` what runs in the
servers' processes.
"""
