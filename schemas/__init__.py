"""What every layer agrees on: jobs, rows, requests, the ledger, errors. No torch, no ray."""
