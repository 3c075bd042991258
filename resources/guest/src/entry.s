# Everything that runs at privilege level 0: the PVH entry, the way down to level 3, and the way back up for what only
# level 0 may do. Plain integer instructions only: on a software KVM this part is interpreted, without SSE.

.set KERNEL_CODE, 0x08
.set KERNEL_DATA, 0x10
.set USER_DATA, 0x1b
.set USER_CODE, 0x23
.set TASK, 0x28
.set PRIVILEGED_FUNCTIONS, 10

# XEN_ELFNOTE_PHYS32_ENTRY (18): where a PVH loader enters.
.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18
.asciz "Xen"
.quad pvh_entry

# Entered in 32-bit protected mode without paging; EBX holds the address of struct hvm_start_info.
.section .text.entry, "ax"
.code32
.global pvh_entry
pvh_entry:
    cld
    mov eax, offset task_state
    mov [task_descriptor + 2], ax
    shr eax, 16
    mov [task_descriptor + 4], al
    mov [task_descriptor + 7], ah
    mov eax, 0x620                      # CR4: PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset level4
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER: LME
    rdmsr
    or eax, 0x100
    wrmsr
    lgdt [global_descriptors_pointer]
    mov eax, 0x80010033                 # CR0: PG, WP, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea                          # jmp KERNEL_CODE:long_mode
    .long long_mode
    .word KERNEL_CODE

.code64
long_mode:
    mov eax, KERNEL_DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, offset kernel_stack_top
    mov eax, TASK
    ltr ax
    lidt [interrupt_descriptors_pointer]
    push USER_DATA
    push offset user_stack_top
    push 2                              # RFLAGS: interrupts stay off until the gates are filled
    push USER_CODE
    push offset user_entry
    iretq

# Level 3 from here on.
user_entry:
    mov eax, USER_DATA
    mov ds, eax
    mov es, eax
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    xor eax, eax
    rep stosb
    mov edi, ebx
    call guest_main
    ud2

# The system call: function in EAX, arguments in RDI, RSI, RDX; answer in RAX; RCX and RDX are lost. The only way from
# level 3 to level 0 that every KVM has is a fault.
.global privileged_call
privileged_call:
    ud2
    ret

invalid_opcode:
    cmp qword ptr [rsp], offset privileged_call
    jne exception_6
    add qword ptr [rsp], 2
    mov eax, eax
    cmp eax, PRIVILEGED_FUNCTIONS
    jae exception_6
    jmp [privileged_functions + rax * 8]

call_in8:
    mov edx, edi
    xor eax, eax
    in al, dx
    iretq
call_in16:
    mov edx, edi
    xor eax, eax
    in ax, dx
    iretq
call_in32:
    mov edx, edi
    in eax, dx
    iretq
call_out8:
    mov edx, edi
    mov eax, esi
    out dx, al
    iretq
call_out16:
    mov edx, edi
    mov eax, esi
    out dx, ax
    iretq
call_out32:
    mov edx, edi
    mov eax, esi
    out dx, eax
    iretq
call_read_msr:
    mov ecx, edi
    rdmsr
    shl rdx, 32
    or rax, rdx
    iretq
call_flush_tlb:
    mov rax, cr3
    mov cr3, rax
    iretq
call_enable_interrupts:
    or qword ptr [rsp + 16], 0x200
    iretq
# Sleeps until an interrupt, unless there were others than the RDI that the caller knows of.
call_wait:
    cmp rdi, [interrupts_total]
    jne 1f
    sti
    hlt
    cli
1:  iretq

# Exceptions: 16 bytes of stub each, so that Rust can compute their addresses. All end in guest_exception(vector, error
# code, RIP, CR2, CS) at level 3, those of level 0 too.
.balign 16
.global exception_stubs
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if vector == 6
    jmp invalid_opcode
    .else
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    .else
    push 0
    .endif
    push vector
    jmp exception
    .endif
    .set vector, vector + 1
.endr

exception_6:
    push 0
    push 6
exception:
    pop rdi
    pop rsi
    mov rdx, [rsp]
    mov rcx, cr2
    mov r8, [rsp + 8]
    mov qword ptr [rsp], offset guest_exception_entry
    mov qword ptr [rsp + 8], USER_CODE
    mov qword ptr [rsp + 16], 2         # RFLAGS: no more interrupts
    mov qword ptr [rsp + 24], offset user_stack_top
    mov qword ptr [rsp + 32], USER_DATA
    iretq

guest_exception_entry:
    call guest_exception
    ud2

# Interrupts: vectors 0x20 to 0x3f, 64 bytes of stub each. They count and tell the local APIC.
.balign 64
.global interrupt_stubs
interrupt_stubs:
.set vector, 0x20
.rept 32
    .balign 64
    inc qword ptr [interrupts + vector * 8]
    inc qword ptr [interrupts_total]
    push rax
    mov rax, [end_of_interrupt]
    mov dword ptr [rax], 0
    pop rax
    iretq
    .set vector, vector + 1
.endr

.section .rodata.entry, "a"
.balign 8
privileged_functions:
    .quad call_in8, call_in16, call_in32, call_out8, call_out16, call_out32
    .quad call_read_msr, call_flush_tlb, call_enable_interrupts, call_wait

.section .data.entry, "aw"
.balign 8
global_descriptors:
    .quad 0
    .quad 0x00af9a000000ffff            # KERNEL_CODE
    .quad 0x00cf92000000ffff            # KERNEL_DATA
    .quad 0x00cff2000000ffff            # USER_DATA
    .quad 0x00affa000000ffff            # USER_CODE
task_descriptor:
    .quad 0x0000890000000067, 0
global_descriptors_end:
global_descriptors_pointer:
    .word global_descriptors_end - global_descriptors - 1
    .long global_descriptors
    .long 0
interrupt_descriptors_pointer:
    .word 4095
    .quad interrupt_descriptors
.balign 8
    .long 0
task_state:                             # 8-byte aligned plus 4, so that RSP0 is aligned
    .long 0
    .quad kernel_stack_top
    .fill 84, 1, 0
    .word 0
    .word 104                           # no I/O permission bitmap

# The identity map of the low 4 GiB in 2 MiB pages, writable and reachable from level 3; no cache from 3 GiB up.
.balign 4096
.global level4
level4:
    .quad level3 + 7
    .fill 511, 8, 0
level3:
    .quad level2 + 0x0007, level2 + 0x1007, level2 + 0x2007, level2 + 0x3007
    .fill 508, 8, 0
level2:
.set page, 0x87
.rept 1536
    .quad page
    .set page, page + 0x200000
.endr
.set page, page + 0x18
.rept 512
    .quad page
    .set page, page + 0x200000
.endr

.section .bss.entry, "aw", @nobits
.balign 4096
.global interrupt_descriptors, interrupts, interrupts_total, end_of_interrupt
interrupt_descriptors:
    .skip 4096
interrupts:
    .skip 2048
interrupts_total:
    .skip 8
end_of_interrupt:
    .skip 8
.balign 4096
    .skip 8192
kernel_stack_top:
    .skip 65536
user_stack_top:
