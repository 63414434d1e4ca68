"""The client's side: how connections are accepted, requests read and answers written. Imports no other room."""
