"""Are the scores of a model or a server right?"""
