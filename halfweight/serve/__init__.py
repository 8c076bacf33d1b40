"""`halfweight serve`: an OpenAI-compatible endpoint for one model.

HTTP by FastAPI and uvicorn, batching by transformers; here is what joins them (`app`), admits and
guards requests (`engine`), and turns tokens into text as they come (`text`).
"""
