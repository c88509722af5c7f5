_s5() {
    local cur="${COMP_WORDS[COMP_CWORD]}" words=
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        words=@first@
    elif [[ $cur == -* ]]; then
        case "${COMP_WORDS[1]}" in
@cases@
        esac
    fi
    if [[ -n $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
    fi
    return 0
}
complete -o bashdefault -o default -F _s5 s5
