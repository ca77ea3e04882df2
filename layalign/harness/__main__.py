from layalign.harness import main

main()
