def test_x(small_store, english_documents):
    print(len(english_documents), sum(map(len,english_documents)), small_store.manifest["splits"], small_store.yardsticks)
