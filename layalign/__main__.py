from layalign.cli import main

main()
