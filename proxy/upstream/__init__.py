"""The nodes' side: the HTTP/1.1 client of the hot path and its deadlines. Imports no other room."""
