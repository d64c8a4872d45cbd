def find_free_port():
    return 1
