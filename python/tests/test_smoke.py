def test_import():
    import peerlane
    assert peerlane.version()
