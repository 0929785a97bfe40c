"""Pages of documents as images, made in a child process that may crash, hang or be killed."""
