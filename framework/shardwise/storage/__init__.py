"""Files that must outlive a crash, and folders that belong to one process.

durable     write a file so that a power loss leaves the old content or the new; move a damaged one
            aside; say what is wrong with the storage and how to mend it
lock        one run a folder, over hosts as far as the file system goes
"""
