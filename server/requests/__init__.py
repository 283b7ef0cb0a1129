"""Unlearning requests: from documents to an active expert.

records    what a request is, and the states it goes through
book       requests in the registry's database
intake     checks of an upload
workspace  where its text lies
documents  rows out of plain documents
jobs       training outside the serving process
ray_jobs   the same on a Ray cluster
gate       whether an expert is good enough without asking a person
service    takes requests and works on them
settings   what `alter serve` is told about them
"""
