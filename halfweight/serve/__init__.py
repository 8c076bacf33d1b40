"""`halfweight serve`: the HTTP face of the engine, as OpenAI's clients expect it.

In: requests of OpenAI's API. Out: answers and streams of events. First file: app.py (routes);
schema.py says what a request may hold, writer.py makes the answers.

May import: errors, engine.
"""
