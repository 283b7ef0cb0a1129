"""Pages for people at `/console`: fleet, domains, unlearning requests, traces.

The console has no powers of its own. Every page is made of answers of `/admin`, asked for with the token of
whoever is logged in, so roles, limits, conditions and the audit log hold as they do for every other client.

inside       the typed client over the application itself
session      who is logged in, and that a form comes from our own pages
pages        a visit, and the templates
fleet, domains, requests, trace   the pages
history      how many tokens were routed lately, for sparklines
app          puts them together

Static files are those of htmx and Pico, as their packages have them, and two small ones of ours: nothing is
built, and nothing is fetched from elsewhere.
"""
